"""Vision transformers: ViT, DeiT, DeiT3, DINOv2, the towers of CLIP and SigLIP."""
