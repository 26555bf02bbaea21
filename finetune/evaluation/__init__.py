"""What drawn pictures are judged by."""
