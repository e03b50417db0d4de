"""The process that owns one device: commands in, events out."""
