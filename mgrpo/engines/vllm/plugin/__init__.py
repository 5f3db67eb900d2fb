"""What runs inside a vLLM server: new weights in place. See extension.py.

Nothing here may import what a server's environment lacks: torch, numpy, msgspec and vLLM are there, with google-crc32c
and zstandard beside them. vLLM itself is imported inside functions, so that the tests need none.
"""
