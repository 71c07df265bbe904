"""Imitation: demonstrations from several sources as samples of one format, and behaviour cloning on them."""
