"""One module per kind of data: its files -> examples."""
