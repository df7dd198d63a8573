"""Ops: for each a shape rule and a NumPy definition, and beside it the compiled kernels.

`norm.py` says what an op means (shapes, equation, source), `norm_cpu.py` holds its Numba kernels
and is imported only to compile them. Symbols are those of the papers:

    T  rows (tokens) of a forward        H  heads             K  width of a key, or of a conv window
    x  input of a mixer                  A  decay rate (< 0)  V  width of a value
    z  gate                              B  write key         N  state size
    dt time step, after softplus         C  read key          S  state: one matrix (K, V) per head
"""
