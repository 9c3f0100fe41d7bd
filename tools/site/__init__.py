"""What `make site` adds to Sphinx: links to the repository's files, equations without scripts."""
