"""Settings that hold for every test."""

import os

# As the command line does: spinning threads lose whole time slices on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
