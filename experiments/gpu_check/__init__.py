"""What must be seen on a GPU: whether it is right there (`correct`), and what it costs there (`speed`). See docs/gpu.md."""
