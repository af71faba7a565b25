"""`axolotl asft report`: a run, drawn."""
