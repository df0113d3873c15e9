"""The vmnet contract: an `Interface` over an engine's link, the thread of its events, its end, its side of asyncio."""
