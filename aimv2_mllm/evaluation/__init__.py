"""How a run is judged: probes of the encoder, answers of the MLLM, paintings of the decoder."""
