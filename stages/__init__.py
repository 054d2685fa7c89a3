"""WHAT happens, node by node: read, call, write. DVC runs each as `python -m stages <stage> <name>`."""
