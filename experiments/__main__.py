"""Accuracy studies: `python -m experiments NAME --data DIR` does what is missing of one, `report` writes the tables.

    python -m experiments.data fashion --output data/fashion      # once; see experiments/README.md
    python -m experiments gathering --data data/fashion --jobs 2
    python -m experiments report                                  # experiments/results/*.md
"""
import argparse
from pathlib import Path

from .report import write
from .runner import run_stage
from .setting import setting
from .studies import STUDIES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='experiments', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='studies (hours on one core):\n' + '\n'.join(
            f'  {name:11} {study.question}\n{"":13} {study.cost}' for name, study in STUDIES.items()))
    parser.add_argument('study', choices=(*STUDIES, 'report'), metavar='STUDY', help='one of those below, or report')
    parser.add_argument('--data', type=Path, help='folder with train.tar, val.tar and test.tar by experiments.data')
    parser.add_argument('--work', type=Path, default=Path('output/experiments'), help='folder for models and logs')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time, one thread each')
    parser.add_argument('--seeds', type=int, help='number of seeds (default: the study\'s)')
    parser.add_argument('--gpu', action='store_true', help='the same study at real size: ViT-S, augmentation, one GPU')
    args = parser.parse_args()
    if args.study == 'report':
        write()
        return
    if args.data is None or not (args.data / 'test.tar').is_file():
        parser.error('--data must be a folder with train.tar, val.tar and test.tar (python -m experiments.data)')
    s = setting(args.data.resolve(), args.work.resolve(), args.gpu, args.seeds)
    for stage in STUDIES[args.study].runs(s):
        run_stage(s.study(args.study), stage, s.work, args.jobs)


if __name__ == '__main__':
    main()
