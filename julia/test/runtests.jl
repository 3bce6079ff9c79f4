using Test

@testset "PrunableFlux" begin
    @testset "$name" for name in ("layers", "selection", "schedule", "training", "experiment", "device", "quality")
        include("$name.jl")
    end
end
