"""Triton kernels and their launchers, one file per operator, imported as fastlocal.triton_kernels.

Importing this package imports no Triton; importing one of its modules does. The operators in fastlocal.ops do so only
when a call is served by Triton.
"""
