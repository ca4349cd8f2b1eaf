"""What the operating system gives: files, memory, devices, the cache and downloads."""
