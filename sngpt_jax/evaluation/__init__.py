"""What a model is worth: scores over a validation stream."""
