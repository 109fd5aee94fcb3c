"""Between texts and tokens: tokenizers, chat templates and their sandbox, stop strings."""
