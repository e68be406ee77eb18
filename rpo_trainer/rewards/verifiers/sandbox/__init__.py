"""What runs a response's code and a row's tests, in two processes without the rest of the package.

`main.py` starts both. The candidate process executes the response's code and holds nothing else. The
tester process executes the tests, and reaches the response's objects through `wire.py` alone. Both
run under `limits.py`. The modules import only the standard library: what they import, the
response's code can reach. They import each other relatively, because this folder is a package called
`sandbox` there (see `asserts.py`): an absolute import would bring in the rest of the package.
"""
