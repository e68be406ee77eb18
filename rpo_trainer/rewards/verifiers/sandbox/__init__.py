"""Run the code of a response and the tests of a row in two processes, without the rest of the package.

`main.py` starts both. The candidate process executes the response's code and contains nothing else. The
tester process executes the tests, and accesses the response's objects only through `wire.py`. Both run
under `limits.py`. The modules import only the standard library, because the response's code can access
everything they import. They use relative imports: this folder is the top-level package `sandbox` there
(see `asserts.py`), and absolute imports would load the rest of the package.
"""
