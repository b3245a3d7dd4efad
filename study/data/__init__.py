"""Sources, texts, tasks, corpus and pre-trained models: what training starts from."""
