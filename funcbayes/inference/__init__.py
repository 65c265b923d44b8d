"""From data to a posterior, one method a module."""
