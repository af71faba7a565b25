"""`python -m axolotl_asft` is `axolotl asft`."""

from axolotl_asft.cli import main

main()
