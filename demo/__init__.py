"""The demo: a small pretrained model, real prompts, and the loop seen from outside."""
