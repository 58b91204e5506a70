"""The bench: a stand-in engine, an independent judge and recorded data; nothing in here imports the sidecar."""
