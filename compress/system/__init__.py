"""What the operating system provides: files, memory, devices, the cache and downloads."""
