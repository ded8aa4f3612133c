import gc

# Before anything imports vLLM, in the processes that tests start, too: as to why, see tests/conftest.py.
gc.set_threshold(50_000, 20, 100)
