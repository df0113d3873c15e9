"""Bytes to values and back, one protocol a file, without any I/O.

Every parser gives a value or raises `openvmnet.errors.Malformed`, whatever the bytes.
"""
