"""Executing the notebooks without anybody watching, and publishing what they leave."""
