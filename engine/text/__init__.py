"""Between texts and tokens: tokenizers, chat templates and their sandbox, formats of answers, stop strings."""
