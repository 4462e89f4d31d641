"""The command line of `python data.py shapes | cityscapes | voc | yolo | check`."""
import argparse
import sys

from formats.check import check
from formats.cityscapes import write_cityscapes
from formats.coco import UPRIGHT
from formats.files import CommandLine, one_line_errors
from formats.pictures import image_options
from formats.shapes import write_shapes
from formats.voc import write_voc
from formats.yolo import write_yolo


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Make, convert and check data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    shapes = commands.add_parser("shapes", help="draw the small data set shapes, in COCO layout",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes.add_argument("dir", metavar="DIR", help="new folder, for example datasets/shapes")
    shapes.add_argument("--train", type=int, default=3000, metavar="N", help="number of training images")
    shapes.add_argument("--val", type=int, default=200, metavar="N", help="number of images to evaluate on")
    shapes.add_argument("--size", type=int, default=128, metavar="S", help="side of an image, pixels")
    shapes.add_argument("--seed", type=int, default=0, metavar="S", help="seed: each draws a different set")
    for command, layout in (("cityscapes", "Cityscapes: leftImg8bit, gtFine"),
                            ("voc", "a folder of Pascal VOC's XML files and their images"),
                            ("yolo", "a folder of YOLO's label files and their images (data.yaml needs PyYAML)")):
        convert = commands.add_parser(command, help=f"write COCO annotation files for {layout}",
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        convert.add_argument("root", metavar="DIR", help="the folder; the files are written to DIR/annotations")
        if command != "cityscapes":
            convert.add_argument("--skip", action="store_true", help="leave out images that cannot be converted, "
                                 "instead of refusing")
            image_options(convert.add_argument)
        if command == "voc":
            convert.add_argument("--pixels-from", type=int, choices=(0, 1), help="what edges of boxes count from: 1, "
                                 "pixels, as VOC does; 0, the lines between them, as labelImg and CVAT do; None: read "
                                 "off the files")
    check = commands.add_parser("check", help="list what is wrong with a data set; exit status 1 if training would "
                                "fail")
    check.add_argument("paths", nargs="+", metavar="DIR_OR_JSON", help="a data set as --data of train.py takes it, or "
                       "a COCO annotation file")
    check.add_argument("--images", metavar="DIR", help="image folder of an annotation file, if it is not beside it")
    image_options(check.add_argument)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    with one_line_errors():
        if options.command == "shapes":
            write_shapes(options.dir, options.train, options.val, options.size, options.seed)
        elif options.command == "cityscapes":
            write_cityscapes(options.root)
        elif options.command == "voc":
            write_voc(options.root, options.pixels_from, options.exif or UPRIGHT, options.skip, options.max_pixels)
        elif options.command == "yolo":
            write_yolo(options.root, options.exif or UPRIGHT, options.skip, options.max_pixels)
        elif check(options.paths, options.images, options.exif, options.max_pixels):
            sys.exit(1)
