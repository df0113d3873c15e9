"""Thin typed doors to what Linux has and the standard library lacks: datagram batches and the loop's fast lane."""
