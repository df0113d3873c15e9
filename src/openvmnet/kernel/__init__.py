"""Thin typed doors to what Linux has and the standard library lacks: batches of datagrams, the event loop's fast lane."""
