"""What the engines read: images of COCO and of classification, their order, COCO's evaluation, and the demo's set."""
