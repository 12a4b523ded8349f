"""What stays for the server's whole life is not looked through again by Python's garbage collector.

A full collection walks every container there is, with Python's lock: 0.3 s for the half a million objects of the
libraries that a server imports and of its tokenizer. It comes when a quarter as many new ones have survived, so
adapters that are loaded beside requests brought it on, and each stream had a gap of that length.
"""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Collect once more, and leave what is there out of all later collections. To be called when everything is loaded;
    what is freed by its last reference is freed as before."""
    gc.collect()
    gc.freeze()
