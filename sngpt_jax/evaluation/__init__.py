"""What a model is worth: scores over a validation stream, downstream tasks, the study of its
sparse codes.
"""
