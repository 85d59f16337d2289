"""What may stand between a model and its workers: it changes what they are sent, and checks what they return."""
