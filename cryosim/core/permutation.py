"""A permutation of the 32-bit numbers, by which numbers in a row come to lie far apart."""

from __future__ import annotations


def permuted(number: int) -> int:
    """The lowest 32 bits well mixed: fmix32 of MurmurHash3 (Appleby 2011, public domain), whose steps can be undone."""
    x = number & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16
