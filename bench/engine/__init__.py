"""llama_split's engine: every way to split a model beside the unsplit one, prompts and generated tokens."""
