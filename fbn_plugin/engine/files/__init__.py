"""Files that anyone may have made, read in bounded time so that nothing in them runs; files that are written whole or
not at all; and the words of the sentences about them."""
