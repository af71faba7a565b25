"""`axolotl asft demo`: the whole story on one CPU, offline, on a small model made on the spot."""
