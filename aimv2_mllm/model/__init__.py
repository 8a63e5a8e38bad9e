"""The networks: encoder, weights on disk, pre-training model, connectors, assembled MLLM."""
