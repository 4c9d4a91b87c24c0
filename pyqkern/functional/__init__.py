"""What users call on tensors."""
