"""AFF_SCL: unsupervised ReID with attention-guided fine-grained features and symmetric contrast learning."""
