"""Tokens: what ids stand for, as the files of tokenizers say."""
