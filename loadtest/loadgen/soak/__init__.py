"""The soak: everything that a server can be asked for, at random and for long, each answer held against what it must
be. ``world`` knows which weights a name may mean, ``questions`` what they answer, ``judge`` tells right from wrong."""
