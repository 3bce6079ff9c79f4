# Most of the time is compilation, so that two processes take half of it. The longest files come first.
using Distributed, Test

const FILES = ["conv", "saliency", "quality", "training", "strategies", "recurrent", "experiment", "structure", "sparse", "windows",
               "device", "layers", "selection", "schedule", "parallel"]

addprocs(2; exeflags = [Base.julia_cmd().exec[2:end]; "--threads=2"])
@everywhere using Random, Test
@everywhere include($(joinpath(@__DIR__, "networks.jl")))
@everywhere function run_file(path)
    Random.seed!(1) # the same weights in every run, in whatever order files come
    @testset "$(basename(path))" begin
        include(path)
    end
    return "passed"
end

@testset "PrunableFlux" begin
    @test issetequal(FILES, setdiff(map(file -> first(splitext(file)), readdir(@__DIR__)), ("runtests", "networks")))
    results = pmap(name -> run_file(joinpath(@__DIR__, "$name.jl")), FILES; on_error = identity)
    for (name, result) in zip(FILES, results)
        @test (name, result) == (name, "passed")
    end
end
