"""What leaves training: packed codes, the artifact, packed modules, ONNX and accelerator formats."""
