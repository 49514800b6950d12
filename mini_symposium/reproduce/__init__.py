"""Execute the notebooks from the command line, and publish their outputs."""
