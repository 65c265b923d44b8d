"""The laws of the library as functions, and hypothesis strategies, for posteriors of one's own."""
