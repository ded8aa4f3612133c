"""The demo: a small pretrained model, real prompts, and a view of the loop from outside the server."""
