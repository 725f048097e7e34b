"""One thread for all tests: the models are tiny, and two threads that wait for each other are slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
