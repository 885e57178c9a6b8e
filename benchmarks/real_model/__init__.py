"""ModularForge on a real pretrained model: fetch and convert it, train, assemble, and measure what is kept and lost."""
