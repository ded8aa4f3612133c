import gc

# Before anything imports torch or vLLM, in the processes that tests start, too: as to why, see conftest.py.
gc.set_threshold(50_000, 20, 100)
